"""Token stores: preparation from corpora, format and storage."""
