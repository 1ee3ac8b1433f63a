// Connectionist temporal classification.
#include "ctc.h"

int64_t fusedloss::kernels::ctc_loss(const CtcArgs& a) { return ctc::run(a); }
