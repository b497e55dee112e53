"""The data sets of files. One module a form; `vadapter.data.open.SOURCES` names them.

What becomes of bad data. Refused: building the source, or reading, ends with a DataError that names
file, line or member, and what to do. Masked: the example keeps its place in the order with weight
0, is counted and named in the log, and never moves another example; more than ten, and more than
0.1 % of what was read, end the run.

  fault                                  what happens
  shard missing                          refused: named by its number, its pattern or the index
  shard torn                             refused when it is scanned or indexed
  shard other than its index says        refused, with the command that indexes it again
  flipped bytes in a tar header          refused when it is scanned or indexed
  flipped bytes in an image              masked where it cannot be decoded; `data index --verify`
                                         finds all of them
  flipped bytes in a parquet file        refused where a page fails its checksum or the footer is
                                         unreadable; `data index --verify` finds all of them
  HTML or anything else, not an image    masked
  image cut short                        masked
  image of more than 25 megapixels       masked, by its header
  image that no file or member holds     refused, by the line of the table
  pair without its image or its text     masked; a shard of images alone is refused, where no
                                         table is beside it
  caption in a table that is not text    refused
  caption in a shard that is not text    masked; more than ten and than `max_bad` are refused
  id of an image twice                   refused
  id of a question twice                 refused
  split without rows                     refused, with the splits that there are
  question without answers               masked in training; answered but not scored in evaluation
  link, device or climbing name in a tar left out of the index; refused where a table wants it
  pickle in a tar                        left out of the index: never read

Nothing from a shard is ever written to a file.
"""
