"""What a config would touch and cost, before anything happens."""
