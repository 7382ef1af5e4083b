"""Guards of a store: is what a run would commit fit to follow what is there?"""
