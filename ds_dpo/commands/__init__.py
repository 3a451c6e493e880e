"""The programs: each reads its options, calls the package, and prints."""
