"""What ends a rank from outside its training: signals, a lost lease, a lost launcher, a hang."""
