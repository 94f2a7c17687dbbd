"""How `xtoken` reads a command line: its parser, advice on misspelt words, and shell completion."""
