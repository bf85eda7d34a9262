"""What is done with gradients once they are right."""
