"""New adapters made of others, adapters exported and measured: long computations, none on the way of a request.

The server's process decides and reads. `deriver` has an adapter composed by a `recipe`, or converted once `convertible`
has found it to be of one of the `kinds`; `process` runs the job. `inspect_weights` and `base_files` measure what is
quickly measured.

The `worker`, a process for each job that is bounded in memory and processor time, computes: `compose`, `convert` and
`write`, on what `lowrank` cuts, and `intruders`. It alone imports PEFT, and only for a job that needs it.

`export` is the command line's, which has no server.
"""
