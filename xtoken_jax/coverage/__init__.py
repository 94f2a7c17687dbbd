"""Which of a student's tokens a teacher shares, by class, and the loss that follows."""
