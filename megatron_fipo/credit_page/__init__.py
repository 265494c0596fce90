"""The credit viewer: a page that shows the tokens of a step's recorded responses with the values of the loss."""
