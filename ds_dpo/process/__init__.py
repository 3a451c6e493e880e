"""This process and its neighbours: who started it, how it leaves, what memory its host has, quiet libraries, faults
that tests ask for.
"""
