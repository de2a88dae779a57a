"""Tables of features: `fastssl embed` writes them, `fastssl neighbours` searches them."""
