"""One catalogue for several servers: a log of changes, and files by digest, in a folder that all see or a bucket.

    store.json                         which store this is: all else lies below its id
    <id>/base.json                     what all servers serve
    <id>/log/<revision>                one change: all that is kept of a name or an alias after it
    <id>/snapshots/<revision>-<id>     all that was kept of every name and alias after a change
    <id>/trimmed/<segment>             which changes were made that are not in the log any more
    <id>/blobs/<digest>/<place>/...    an adapter's two files; a place is written once, and referred to by versions
    <id>/tasks/<digest>/<revision>     a task that a gate names, put for a change
    <id>/claims/<what>/<number>        which server judges a candidate: the last one says

The only thing that must be atomic is that an object is made if there is none of its name: who makes the next object of
the log has made the next change. Each server keeps a copy of it all in its data directory, which takes over change
after change. An object of the log is never written over, and removed once two snapshots have it and its id is noted.
"""
