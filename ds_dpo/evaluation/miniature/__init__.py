"""The comparison of miniature models: reward, table, picture."""
