"""`make bench`: our programs beside the Go ones and the field's, the same load in turn on one machine."""
