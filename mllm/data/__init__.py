"""From files to batches: schema, readers, images, templates, labels."""
