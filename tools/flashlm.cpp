// SPDX-License-Identifier: Apache-2.0
// flashlm: everything around training, from text to tokens and from a run to text. Exit codes: 0 done, 1 a
// mistake or a failure, in one line on stderr.
#include <CLI/CLI.hpp>
#include <exception>
#include <iostream>

#include "tools/commands.h"

int main(int argc, char** argv) {
  CLI::App app("FlashLM: language models with ternary weights, trained on CPUs.", "flashlm");
  app.require_subcommand(1);
  flashlm::add_prepare(app);
  flashlm::add_encode(app);
  flashlm::add_decode(app);
  flashlm::add_classes(app);
  flashlm::add_embeddings(app);
  flashlm::add_import_hgrn_bit(app);
  flashlm::add_convert_head(app);
  flashlm::add_pack(app);
  flashlm::add_generate(app);
  flashlm::add_evaluate(app);
  flashlm::add_export(app);
  try {
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::CallForAllHelp& help) {
    return app.exit(help);
  } catch (const CLI::RuntimeError& interrupted) {
    return interrupted.get_exit_code();
  } catch (const CLI::ParseError& error) {
    std::cerr << "flashlm: " << error.what() << "; see flashlm --help\n";
  } catch (const std::exception& error) {
    const std::string text = error.what();
    std::cerr << "flashlm: " << text.substr(0, text.find('\n')) << "\n";  // LibTorch appends a backtrace
  }
  return 1;
}
