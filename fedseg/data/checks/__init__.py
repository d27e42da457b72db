"""`fedseg check`: what is looked at in a site's folder before a study does."""
