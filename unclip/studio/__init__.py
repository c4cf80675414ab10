"""The studio: a page in the browser over the pipelines, alone or beside the server."""
