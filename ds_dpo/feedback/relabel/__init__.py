"""Label the pairs of a data set again by scorers of images: scored once, on all ranks, then judged and compared."""
