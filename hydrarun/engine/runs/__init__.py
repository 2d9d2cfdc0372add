"""One run, a batch of many, and how good their pictures are."""
