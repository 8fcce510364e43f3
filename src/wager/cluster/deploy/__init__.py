"""Deploy: a plan becomes processes. Stages of the real engine, each with a context daemon; a router with the OpenAI API in front.

`process` and `ray_process` start processes (on this machine, or on a Ray cluster), `replica` keeps a pipeline of them alive through kills
and notices, `engine` makes it look like one engine, `router` spreads requests over several, `plan` reads the TOML file.
"""
