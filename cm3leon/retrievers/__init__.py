"""Dense retrieval of documents for a query document (paper section 2.2)."""
