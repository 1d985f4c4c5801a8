from prgkit.api import Bundle as Bundle
from prgkit.api import Run as Run
from prgkit.api import Update as Update
from prgkit.api import compare as compare
from prgkit.api import distill as distill
from prgkit.api import label as label
from prgkit.api import load as load
from prgkit.api import pull as pull
from prgkit.errors import PrgkitError as PrgkitError
from prgkit.evaluate.predict import Model as Model
from prgkit.evaluate.predict import Prediction as Prediction
from prgkit.evaluate.report.schema import Report as Report

__version__: str
