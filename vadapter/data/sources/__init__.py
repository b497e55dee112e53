"""Data sets in files, a module per format; `vadapter.data.open.SOURCES` lists them.

Treatment of bad data. Refused: opening or reading the source raises a DataError that names the
file, line or member, and the remedy. Masked: the example keeps its position with weight 0, is
counted and logged, and never moves another example; more than ten of them that are also more than
0.1 % of what was read end the run.

  fault                                  what happens
  shard missing                          refused: named by its number, its pattern or the index
  shard truncated                        refused when it is scanned or indexed
  shard that differs from its index      refused, with the command that indexes it again
  flipped bytes in a tar header          refused when it is scanned or indexed
  flipped bytes in an image              masked where it cannot be decoded; `data index --verify`
                                         finds all of them
  flipped bytes in a parquet file        refused where a page fails its checksum or the footer is
                                         unreadable; `data index --verify` finds all of them
  HTML or other content, not an image    masked
  image truncated                        masked
  image of more than 25 megapixels       masked, by its header
  image that is missing                  refused, with the line of the table
  pair without its image or its text     masked; a shard of images alone is refused, unless a table
                                         is beside it
  caption in a table that is not text    refused
  caption in a shard that is not text    masked; more than ten and than `max_bad` are refused
  id of an image twice                   refused
  id of a question twice                 refused
  split without rows                     refused, with the existing splits
  question without answers               masked in training; answered but not scored in evaluation
  link, device or climbing name in a tar left out of the index; refused if a table names it
  pickle in a tar                        left out of the index: never read

Nothing from a shard is ever written to a file.
"""
