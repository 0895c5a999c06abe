"""The command line of `osora`: words in, words out. All work happens in `opensora_core`."""
