"""Parts of the command export: the model card, the upload, the progress bar."""
