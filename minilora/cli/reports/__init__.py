"""What verbs that look at files say of them: facts as values that JSON can hold, and the same as tables."""
