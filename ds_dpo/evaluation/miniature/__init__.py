"""The miniature's own comparison: reward, table, picture."""
