"""The grader: a learner's answer at a few points, and what is said about it."""
