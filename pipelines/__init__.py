"""Datasets in, datasets out: catalog, decode, encode, snapshots, index, search."""
