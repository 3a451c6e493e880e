"""Weight files and their headers; names, shapes and configurations of their tensors."""
