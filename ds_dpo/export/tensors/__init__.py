"""Read, restore, stream and verify the tensors of an export."""
