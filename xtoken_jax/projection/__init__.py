"""W, the sparse projection from the student's vocabulary into the teacher's."""
