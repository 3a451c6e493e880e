"""A checkpoint exists or it does not: written aside, agreed on, verified, kept, resumed."""
