"""`jevons bench`: this engine beside `transformers` and llama.cpp, same weights, same requests, one run."""
