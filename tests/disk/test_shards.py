"""Shards on disk: whole or made again, here and in the mirror, whatever happens to them."""
def test_x(): pass
