"""What a demo tells of a training by `minilora.train.fit`."""

from minilora.train.beside import Beside


class Told(Beside):
    """A line for each report of the loop; `said` puts the mean loss into words."""

    def __init__(self, progress, label, said="loss {:<8.3g}".format):
        self.progress, self.label, self.said, self.told = progress, label, said, 0

    def after_step(self, run, made):
        if made.mean is not None:
            self.progress.advance(run.step - self.told, f"{self.label} step {run.step:>4}  {self.said(made.mean)}")
            self.told = run.step
