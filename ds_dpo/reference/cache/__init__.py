"""The reference's errors computed beforehand: their making and their reading."""
