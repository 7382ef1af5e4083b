"""Folders of checked files, published whole on a disk or an object store, by one of all who ask."""
