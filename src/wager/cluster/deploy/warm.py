"""Imported by the template that stages are forked from: brings in everything a stage needs before it is needed.

Sketching a model on torch's meta device once imports some 800 modules of torch; a fork of this process has them already.
"""

from wager.cluster.deploy import worker
from wager.serve.parallel.stage import skeleton

WORKER = worker.StageWorker
skeleton("demo")
