"""Parts of the command export: the model card, the upload, the bar that shows how far it is."""
