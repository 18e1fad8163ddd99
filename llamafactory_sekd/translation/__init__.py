"""`sekd translate`: text in, translations out, as text or as a data set to train on."""
