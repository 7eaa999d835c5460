"""Whole networks that timm lacks, in plain PyTorch under the published parameter names: what `check_models.py` compares karat with.

Written from the specifications on top of the attention of `twins`; each takes the sizes of its published variants.
"""

from .context_cluster import ContextCluster
from .dilateformer import DilateFormer
from .gmm_vit import GmmVit
from .hpvit import Hpvit
from .pvt import Pvt, UmPvt
from .spvit import DEIT_B_HIDDEN, Spvit
from .spvit_swin import SWIN_T_HIDDEN, SpvitSwin
from .t2t import T2t
from .um_swin import UmSwin
from .vt_resnet import MultiheadTokens, VtResnet
from .xvit import Xvit

#: karat's name -> how to build it, for `depths` if it is to be cut.
NETWORKS = {
    "dilateformer_tiny": lambda depths=(2, 2, 6, 2): DilateFormer(depths),
    "coc_tiny": lambda depths=(3, 4, 5, 2): ContextCluster(depths, (32, 64, 196, 320), (4, 4, 8, 8), 24),
    "t2t_vit_14": lambda depths=14: T2t(384, depths, 6, 3),
    "t2t_vit_t_14": lambda depths=14: T2t(384, depths, 6, 3, performer=False),
    "xvit_tiny": lambda depths=24: Xvit(192, 96, depths),
    "pvt_tiny": lambda depths=(2, 2, 2, 2): Pvt(depths),
    "pvt_small_256": lambda depths=(3, 4, 6, 3): UmPvt(depths),
    "um_swin_tiny_256": lambda depths=(2, 2, 6, 2): UmSwin(depths),
    "hpvit_base": lambda depths=(2, 2, 6, 2): Hpvit(depths),
    "vt_resnet18": lambda depths=(2, 2, 2): VtResnet(depths),
    "vt_resnet18_multihead": lambda depths=(2, 2, 2): VtResnet(depths, MultiheadTokens),
    "gmm_vit": lambda depths=9: GmmVit(depths),
    "spvit_deit_b_l008_t60": lambda: Spvit("11133MMMMMMM", DEIT_B_HIDDEN, 768, 12),
    "spvit_swin_t_l28_t32": lambda: SpvitSwin(("1s", "1s", "MMMMMM", "MM"), SWIN_T_HIDDEN),
}
