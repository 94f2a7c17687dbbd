"""Files and datasets of one format each, any record of which can be read."""
