static std::vector<Variant> variants() {
  constexpr int B = EARLY | W2SS;
  return {
    variant<STORE_TMA | B>("b3 early w2ss"),                       // 0
    variant<STORE_TMA | B | AHEAD>("b3 early w2ss ahead"),         // 1
    variant<STORE_TMA | B | W1SS>("b3 early w1ss w2ss"),
    variant<STORE_TMA | B | W1SS | AHEAD>("b3 early w1ss w2ss ahead"),
    variant<STORE_TMA | EARLY | W1SS>("b3 early w1ss"),
    variant<STORE_TMA | W2SS>("b3 w2ss"),
    variant<STORE_TMA | W2SS | W1SS>("b3 w1ss w2ss"),
    variant<STORE_TMA | B | LIGHT>("b3 early w2ss light"),
    variant<STORE_TMA | B | AHEAD | LIGHT>("b3 early w2ss ahead light"),
    variant<STORE_TMA | B | STAGGER>("b3 early w2ss stagger"),
    variant<STORE_TMA | B | AHEAD | STAGGER>("b3 early w2ss ahead stagger"),
    variant<STORE_TMA | B | STATES>("b3 early w2ss, states by TMA"),
    variant<STORE_TMA | B | AHEAD | STATES>("b3 early w2ss ahead, states by TMA"),
    variant<B>("b3: no stores"),
    variant<B | NO_TMA>("b3: no stores, loads"),
    variant<B | NO_TMA | NO_TANH>("b3: no stores, loads, tanh"),
    variant<B | NO_TMA | NO_DN>("b3: no stores, loads, dn"),
    variant<B | NO_TMA | NO_DW>("b3: no stores, loads, dW"),
    variant<B | AHEAD | NO_TMA>("b3 ahead: no stores, loads"),
  };
}
