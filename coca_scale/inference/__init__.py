"""A trained model in use: loading, captions, export, a web page."""
