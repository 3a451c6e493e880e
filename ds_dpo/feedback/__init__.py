"""Feedback from models and people on images: pairs that are labelled again."""
