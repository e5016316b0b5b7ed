"""The demo: a small digits classifier, client streams that drift, and a look at what adaptation does for them."""
