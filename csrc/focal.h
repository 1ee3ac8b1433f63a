// What the focal loss makes of a class's -log p, and of the gradient: (1 - p)^gamma of it, with all digits.
#pragma once
#include <type_traits>

#include "math.h"

namespace fusedloss {

struct Focal {
    double value;  // (1 - p)^gamma
    double slope;  // what the gradient p - 1 is multiplied by
};

// From p, rest = 1 - p with its digits, and surprise = -log p. The derivative of (1 - p)^gamma surprise by
// the logits is that of the surprise times (1 - p)^gamma (1 + gamma p surprise / (1 - p)): no digits cancel.
template <bool square>
inline Focal focal(double p, double rest, double surprise, double gamma) {
    const double power = square ? rest * rest : math::pow(rest, gamma);
    const double ratio = p == 0 ? 0.0 : rest == 0 ? 1.0 : p * surprise / rest;
    return {power, power * (1 + gamma * ratio)};
}

// f(std::bool_constant) of whether the power is a square, which is made without a logarithm.
template <class F>
inline void with_power(double gamma, F&& f) {
    if (gamma == 2)
        f(std::true_type());
    else
        f(std::false_type());
}

}  // namespace fusedloss
