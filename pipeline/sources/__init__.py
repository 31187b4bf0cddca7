"""Where assets come from: each source gives records and open bytes."""
