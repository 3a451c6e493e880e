"""A rank's micro-batches: order by formula, draws by pair, the loader."""
