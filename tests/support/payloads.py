"""Pickles that make a folder when they are read, as each writer of pickles leaves them in a file."""

import os
import pickle

import torch


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def by_torch(content, path):
    torch.save({"module": content}, path)


def by_old_torch(content, path):
    torch.save({"module": content}, path, _use_new_zipfile_serialization=False)


def by_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


WRITERS = (by_torch, by_old_torch, by_pickle)
