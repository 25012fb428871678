"""Reference models that call the ops."""
